import sys

from teacherstudent.cli import main

if __name__ == "__main__":
    sys.exit(main())
