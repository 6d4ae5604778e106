"""Command line of lit_spu from a checkout: `python cli.py fit --config configs/kladder.yaml`."""

from lit_spu.__main__ import main

if __name__ == "__main__":
    main()
