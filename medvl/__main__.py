"""``python -m medvl`` is the ``medvl`` command."""

from medvl._entry import main

if __name__ == "__main__":
    main()
