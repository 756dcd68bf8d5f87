"""The one way files are written, checked and read. Everything here is also the only code that touches pickles."""
