"""`python -m transnormer` is the command `transnormer`."""

from transnormer.cli import main

if __name__ == "__main__":
    main()
