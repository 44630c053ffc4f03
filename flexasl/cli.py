"""`python -m flexasl.cli` is `python -m flexasl`."""

from flexasl.tools.cli import main as main

if __name__ == "__main__":
    main()
