"""``python -m rdlm``: the same program as the ``rdlm`` console script."""

from rdlm.cli import main

if __name__ == "__main__":
    main()
