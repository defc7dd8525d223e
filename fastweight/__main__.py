"""`python -m fastweight` is the program `fastweight`."""

from fastweight.cli import main

if __name__ == "__main__":
    main()
