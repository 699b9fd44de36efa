"""`python -m hqlabel`: the same command line as `hqlabel`, for a checkout that is not installed."""

from hqlabel.jobs.cli.main import main

if __name__ == "__main__":
    main()
