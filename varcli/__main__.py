"""`python -m varcli` and `torchrun -m varcli`: the same as the `varcli` script."""

from varcli.cli.app import main

if __name__ == "__main__":
    main()
