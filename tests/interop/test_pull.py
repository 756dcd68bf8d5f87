"""Released models by name, from a Hub on this machine: what is fetched, resumed, pinned and refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import run_hub

from varcli.artifacts.fetch import pin_file, pinned
from varcli.artifacts.verify import read_manifest
from varcli.errors import ArtifactError, ConfigError, IntegrityError, UnsafeFileError
from varcli.interop import hub as hub_module
from varcli.interop import pull as pull_module
from varcli.interop.pull import pull_model
from varcli.interop.releases import RELEASES, TOKENIZER_FILE, Release
from varcli.tokenizer import store as tokenizers
from varcli.transformer import store as transformers

ROOT = Path(__file__).parents[2]
REPO = "FoundationVision/var"
TINY = Release(
    repo=REPO,
    revision="main",
    tokenizer="vae_tiny.pth",
    transformer="var_d2.pth",
    depth=2,
    side=32,
    licence="MIT",
    source="https://example.org/var",
)


def files_of(tokenizer_state, transformer_state, folder: Path) -> dict[str, bytes]:
    """The tiny models as the bytes of released files."""
    folder.mkdir()
    torch.save(tokenizer_state, folder / TINY.tokenizer)
    torch.save(transformer_state, folder / TINY.transformer)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tokenizer_state, transformer_state, tmp_path, monkeypatch):
    """A Hub with the tiny model, an empty working folder, caches of their own, and no waiting."""
    from huggingface_hub import constants, file_download

    with run_hub(REPO) as server:
        server.files = files_of(tokenizer_state, transformer_state, tmp_path / "published")
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        for module in (constants, file_download):  # before 1.0 the second has a name of its own for it
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setenv("VARCLI_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setitem(pull_module.RELEASES, "var-d2", TINY)
        monkeypatch.setattr(pull_module, "_PAUSE", 0.0)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


@pytest.fixture
def downloads(tmp_path):
    return tmp_path / "cache" / "releases" / "FoundationVision--var"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_every_release_has_the_tokenizer_and_a_transformer_of_its_depth():
    assert list(RELEASES) == ["var-d16", "var-d20", "var-d24", "var-d30", "var-d36"]
    for name, release in RELEASES.items():
        assert release.files == {"tokenizer": TOKENIZER_FILE, "transformer": f"var_d{release.depth}.pth"}
        assert name == f"var-d{release.depth}" and release.licence == "MIT"
        assert release.side == (512 if release.depth == 36 else 256)


def test_a_pull_writes_the_released_model(hub, downloads, tiny_tokenizer, tiny_transformer):
    result = pull_model("var-d2")
    assert (result.folder, result.is_new) == (Path("models/var-d2"), True)
    assert tokenizers.load_tokenizer(result.folder / "tokenizer").fingerprint() == tiny_tokenizer.fingerprint()
    transformer, manifest = transformers.load_transformer(result.folder / "transformer")
    assert all(torch.equal(tensor, tiny_transformer.state_dict()[n]) for n, tensor in transformer.state_dict().items())
    assert manifest.info["source"]["sha256"] == sha256(hub.files["var_d2.pth"])
    assert result.sha256 == {name: sha256(content) for name, content in hub.files.items()}
    assert result.downloads == downloads
    assert pinned(downloads / "var_d2.pth").sha256 == sha256(hub.files["var_d2.pth"])
    # of one commit, so that both come from the same state of the repository
    assert ("GET", f"/{REPO}/resolve/{hub.commit}/vae_tiny.pth") in hub.asked


def test_licence_sizes_and_places_come_before_the_first_byte(hub, downloads):
    steps, asked = [], []

    def report(step):
        steps.append(step)
        asked.append(len(hub.downloads))

    pull_model("var-d2", on_step=report)
    message = steps[0].message
    size = len(hub.files["var_d2.pth"]) / 1e6
    for part in (
        "MIT licence",
        "https://example.org/var",
        f"var_d2.pth  {size:.1f} MB",
        str(downloads),
        "models/var-d2",
    ):
        assert part in message
    assert asked[0] == 0
    total = sum(map(len, hub.files.values()))
    shown = [step.done for step in steps if step.unit == "bytes"]
    assert shown == sorted(shown) and (shown[0], shown[-1]) == (0, total)
    assert {step.total for step in steps if step.unit == "bytes"} == {total}


def test_a_model_that_is_there_and_whole_is_left_alone(hub):
    first = pull_model("var-d2")
    asked, made = len(hub.asked), (first.folder / "transformer" / "manifest.json").stat().st_mtime_ns
    again = pull_model("var-d2")
    assert (again.is_new, again.sha256) == (False, first.sha256)
    assert len(hub.asked) == asked
    assert (first.folder / "transformer" / "manifest.json").stat().st_mtime_ns == made


def test_a_damaged_model_is_named_and_not_taken_for_whole(hub):
    folder = pull_model("var-d2").folder
    weights = folder / "transformer" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"transformer` is damaged: weights\.safetensors") as raised:
        pull_model("var-d2")
    assert "delete it" in raised.value.hint


def test_a_model_of_other_files_is_not_overwritten(hub):
    folder = pull_model("var-d2").folder
    path = folder / "tokenizer" / "manifest.json"
    value = json.loads(path.read_text())
    value["info"]["source"]["file"] = "mine.pth"
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=r"was not made from FoundationVision/var's vae_tiny\.pth") as raised:
        pull_model("var-d2")
    assert raised.value.hint == "choose another --out"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_that_is_no_model_folder_is_refused_before_anything_is_asked(hub, kind):
    place = Path("photos")
    if kind == "folder":
        place.mkdir()
    note = place / "note.txt" if kind == "folder" else place
    note.write_text("mine")
    with pytest.raises(ArtifactError, match="photos") as raised:
        pull_model("var-d2", place)
    assert "choose another --out" in raised.value.hint
    assert note.read_text() == "mine" and not hub.asked


def test_an_import_that_was_stopped_goes_on_without_the_network(hub):
    folder = pull_model("var-d2").folder
    (folder / "transformer" / "manifest.json").unlink()
    asked = len(hub.asked)
    assert pull_model("var-d2").is_new
    assert read_manifest(folder / "transformer").kind == "transformer"
    assert len(hub.asked) == asked


def test_dropped_connections_go_on_where_they_stopped(hub):
    hub.cut = 700_000
    result = pull_model("var-d2")
    assert result.sha256 == {name: sha256(content) for name, content in hub.files.items()}
    starts = [wanted for path, wanted, _ in hub.downloads if path.endswith(sha256(hub.files["vae_tiny.pth"]))]
    assert starts[:3] == [None, "bytes=700000-", "bytes=1400000-"]


def test_a_killed_pull_goes_on_in_the_next_one(hub, downloads):
    class Killed(BaseException):
        pass

    def kill(step):
        if step.done >= 2**20:
            raise Killed

    with pytest.raises(Killed):
        pull_model("var-d2", on_step=kill)
    kept = (downloads / "vae_tiny.pth.part").stat().st_size
    assert kept >= 2**20 and not Path("models/var-d2").exists()
    steps = []
    assert pull_model("var-d2", on_step=steps.append).is_new
    assert steps[0].done == kept and "still to fetch" in steps[0].message
    assert hub.downloads[1][1] == f"bytes={kept}-"


def test_a_file_that_changed_since_it_was_pinned_is_refused_before_it_is_fetched(hub, downloads):
    first = pull_model("var-d2")
    (downloads / "var_d2.pth").unlink()
    hub.files["var_d2.pth"] = hub.files["var_d2.pth"][::-1]
    fetched = len(hub.downloads)
    with pytest.raises(IntegrityError, match=r"var_d2\.pth of .* is another file than the one fetched first") as raised:
        pull_model("var-d2", Path("other"))
    assert str(pin_file(downloads / "var_d2.pth")) in raised.value.hint
    assert len(hub.downloads) == fetched
    assert not Path("other").exists() and not (downloads / "var_d2.pth").exists()
    assert pull_model("var-d2").sha256 == first.sha256  # the model made before stays good


def test_the_pin_holds_where_the_hub_tells_no_hash(hub, downloads):
    hub.large = False
    pull_model("var-d2")
    (downloads / "var_d2.pth").unlink()
    hub.files["var_d2.pth"] = hub.files["var_d2.pth"][::-1]
    with pytest.raises(IntegrityError, match="is expected"):
        pull_model("var-d2", Path("other"))
    assert not Path("other").exists() and not (downloads / "var_d2.pth").exists()


def test_bytes_that_are_not_what_the_hub_names_are_refused(hub, downloads, monkeypatch):
    ask = pull_module.ask_hub

    def lie(*arguments, **options):
        found = ask(*arguments, **options)
        return hub_module.HubFile(url=found.url, size=found.size, sha256="0" * 64, headers={})

    monkeypatch.setattr(pull_module, "ask_hub", lie)
    with pytest.raises(IntegrityError, match=r"000000000000\.\.\. is expected"):
        pull_model("var-d2")
    assert pinned(downloads / "vae_tiny.pth") is None and not Path("models/var-d2").exists()


def test_an_edited_download_is_refused(hub, downloads):
    pull_model("var-d2")
    (downloads / "var_d2.pth").write_bytes(b"other")
    with pytest.raises(IntegrityError, match="was fetched first") as raised:
        pull_model("var-d2", Path("other"))
    assert f"delete `{downloads / 'var_d2.pth'}`" in raised.value.hint
    assert not Path("other").exists()


def test_a_file_that_could_run_code_is_refused_and_nothing_written(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("boo",)

    torch.save({"pos_start": torch.ones(1), "evil": Evil()}, tmp_path / "evil.pth")
    hub.files["var_d2.pth"] = (tmp_path / "evil.pth").read_bytes()
    with pytest.raises(UnsafeFileError, match="print"):
        pull_model("var-d2")
    assert not Path("models/var-d2").exists()


def test_weights_of_another_depth_or_size_are_refused(hub, monkeypatch):
    for field, value, message in (
        ("depth", 16, "has depth = 2, but 16"),
        ("side", 256, "has image_size = 32, but 256"),
    ):
        release = Release(**{**vars(TINY), field: value})
        monkeypatch.setitem(pull_module.RELEASES, "var-d2", release)
        with pytest.raises(ArtifactError, match=message):
            pull_model("var-d2")
    assert not Path("models/var-d2").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda hub: hub.files.pop("var_d2.pth"), r"`var_d2\.pth` of FoundationVision/var: .* no such file \(404\)"),
        (lambda hub: setattr(hub, "repo", "else/where"), "there is no such repository"),
        (lambda hub: setattr(hub, "busy", 1000), "the server answered 503"),
        (lambda hub: (hub.shutdown(), hub.server_close()), "no network, or the server cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_one_error_that_says_how_to_do_it_by_hand(hub, spoil, message):
    spoil(hub)
    with pytest.raises(ArtifactError, match=message) as raised:
        pull_model("var-d2")
    by_hand = "varcli import vae_tiny.pth var_d2.pth --out models/var-d2"
    assert by_hand in raised.value.hint and "https://example.org/var by hand" in raised.value.hint
    assert not Path("models").exists()


def test_a_server_that_is_busy_for_a_moment_is_asked_again(hub):
    hub.busy = 2
    steps = []
    assert pull_model("var-d2", on_step=steps.append).is_new
    assert "trying again" in steps[0].message


def test_an_answer_of_something_else_than_a_hub_is_told(hub):
    hub.commit, hub.large = None, False  # what a login page of a network sends names no commit
    with pytest.raises(ArtifactError, match="is not the Hugging Face Hub"):
        pull_model("var-d2")


def test_without_huggingface_hub_the_way_by_hand_is_told(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ArtifactError, match="huggingface_hub is not installed") as raised:
        pull_model("var-d2")
    assert "by hand" in raised.value.hint


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ArtifactError, match=r"0\.0 MB free, but about") as raised:
        pull_model("var-d2")
    assert "VARCLI_CACHE" in raised.value.hint
    assert not hub.downloads


def test_a_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull_model("var-d2")
    assert hub.tokens == ["Bearer hf_secret"] * 4  # each file: what it is, and the way to it
    assert [token for _, _, token in hub.downloads] == [None, None]


def test_an_unknown_name_lists_those_there_are(hub):
    with pytest.raises(ConfigError, match="unknown released model `var-16`") as raised:
        pull_model("var-16")
    assert "var-d16" in raised.value.hint
    assert not hub.asked


def put_in_hf_cache(root: Path, name: str, content: bytes, digest: str) -> Path:
    """Lay a file where huggingface_hub would have put it."""
    folder = root / "models--FoundationVision--var"
    for path in (folder / "refs", folder / "blobs", folder / "snapshots" / ("c" * 40)):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("c" * 40)
    (folder / "blobs" / digest).write_bytes(content)
    link = folder / "snapshots" / ("c" * 40) / name
    link.symlink_to(folder / "blobs" / digest)
    return link


def test_files_in_huggingface_hubs_own_cache_are_used(hub, downloads, tmp_path):
    for name, content in hub.files.items():
        put_in_hf_cache(tmp_path / "hf" / "hub", name, content, sha256(content))
    result = pull_model("var-d2")
    assert result.sha256 == {name: sha256(content) for name, content in hub.files.items()}
    assert not hub.asked
    assert pinned(downloads / "var_d2.pth").sha256 == sha256(hub.files["var_d2.pth"])
    assert not (downloads / "var_d2.pth").exists()


def test_a_damaged_file_in_that_cache_is_refused_and_not_pinned(hub, downloads, tmp_path):
    content = hub.files["vae_tiny.pth"]
    put_in_hf_cache(tmp_path / "hf" / "hub", "vae_tiny.pth", content[:-1], sha256(content))
    with pytest.raises(IntegrityError, match="the cache knows it as"):
        pull_model("var-d2")
    assert pinned(downloads / "vae_tiny.pth") is None


RUN = """
import sys
from varcli.cli.app import main
from varcli.interop import pull
from varcli.interop.releases import RELEASES, Release
pull._PAUSE = 0.0
release = RELEASES["var-d16"]
tiny = {"tokenizer": "vae_tiny.pth", "transformer": "var_d2.pth", "depth": 2, "side": 32}
RELEASES["var-d16"] = Release(**{**vars(release), **tiny})
sys.argv = ["varcli", "pull", "var-d16", *sys.argv[1:]]
main()
"""


def run_program(address: str, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program on its own, so that the library reads its settings as it does for users."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VARCLI_"))}
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "VARCLI_CACHE": str(tmp_path / "cache"),
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=tmp_path,
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
    )


def test_the_program_pulls_from_the_endpoint_that_is_set_and_prints_no_foreign_bar(hub, tmp_path):
    done = run_program(hub.address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("models/var-d16: var-d16, 32 px, MIT licence")
    assert done.stderr.startswith("var-d16, 32 px: MIT licence")
    assert done.stderr.splitlines()[-1] == "next: varcli sample --model var-d16 --class 207"
    assert "%|" not in done.stderr and "\r" not in done.stderr
    for line in done.stderr.splitlines():
        assert line.startswith(("var-d16", "  v", "downloads", "pulling: ", "reading", "writing", "next: ")), line
    again = run_program(hub.address, tmp_path, "--json")
    value = json.loads(again.stdout)
    assert (value["new"], value["licence"]) == (False, "MIT")
    assert value["sha256"]["var_d2.pth"] == sha256(hub.files["var_d2.pth"])


def test_offline_the_program_asks_nobody(hub, tmp_path):
    done = run_program(hub.address, tmp_path, "--out", "mine", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and not hub.asked
    assert "HF_HUB_OFFLINE is set" in done.stderr and "by hand" in done.stderr
    assert "varcli import vae_tiny.pth var_d2.pth --out mine" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "mine").exists()
