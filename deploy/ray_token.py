"""Puts the cluster's Ray token where Ray looks for it, with the node's own rights.

    python deploy/ray_token.py /hqlabel/ray-token             an SSM parameter, on AWS
    python deploy/ray_token.py gs://private-bucket/ray-token  an object of a bucket that only nodes may read

Run on every node before `ray start`. The token is never an argument, an environment variable or a line of
cluster.yaml; the file is 0600 in a folder of 0700. The region is AWS_REGION or, on EC2, the node's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fsspec
from botocore.session import Session
from botocore.utils import InstanceMetadataRegionFetcher

MIN_TOKEN_CHARS = 32


def read_token(name: str) -> str:
    """The token in the SSM parameter or the object `name`. Raises what the store's library raises."""
    if "://" in name:
        with fsspec.open(name, "r") as file:
            return str(file.read()).strip()
    session = Session()
    region = session.get_config_variable("region") or os.environ.get("AWS_REGION")
    client = session.create_client(
        "ssm", region_name=region or InstanceMetadataRegionFetcher().retrieve_region()
    )
    return str(client.get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"]).strip()


def write_private(path: Path, text: str) -> None:
    """Writes `text` so that nobody but the owner can read it, at any moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def main() -> None:
    """Reads the token from the place given, writes ~/.ray/auth_token (or RAY_AUTH_TOKEN_PATH)."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: ray_token.py NAME-OF-AN-SSM-PARAMETER or URI-OF-AN-OBJECT")
    token = read_token(sys.argv[1])
    if len(token) < MIN_TOKEN_CHARS:
        raise SystemExit(
            f"{sys.argv[1]}: {len(token)} characters are too few for a token, wanted {MIN_TOKEN_CHARS} or "
            "more; make one with `openssl rand -hex 32`"
        )
    default = Path.home() / ".ray" / "auth_token"
    write_private(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default), token)


if __name__ == "__main__":
    main()
