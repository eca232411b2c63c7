"""`python -m stateset_lightning` is the same program as `stateset-lightning`."""

from stateset_lightning.cli import main

if __name__ == "__main__":
    main()
