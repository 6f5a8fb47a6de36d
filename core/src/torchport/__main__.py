"""`python -m torchport` is the `torchport` command."""

from torchport.cli import main

if __name__ == "__main__":
    main()
