"""What the servers of the stack are told: ports, secrets, and the settings made from them."""

from __future__ import annotations

import secrets
import shlex
from typing import Annotated

from pydantic import Field

from ling_flow.config import StrictModel

HOST = "127.0.0.1"
DATABASES = ("mlflow", "mlflow_auth")
DATABASE_USER = "ling_flow"
ADMIN = "admin"
ARTIFACTS_BUCKET, MLFLOW_BUCKET = "ling-flow", "mlflow"
REGION = "us-east-1"


Port = Annotated[int, Field(ge=1, le=65535)]


class Ports(StrictModel):
    """TCP ports on 127.0.0.1, chosen once. Each of the object store's four has a second one, where it speaks gRPC."""

    postgres: Port
    mlflow: Port
    s3: Port
    s3_inner: tuple[Port, ...] = Field(min_length=7, max_length=7)


class Record(StrictModel):
    """What `stack.json` holds."""

    wanted_up: bool = Field(description="whether `up` came last, and not `down`")
    ports: Ports


class Key(StrictModel):
    """A pair that signs requests to the object store."""

    id: str
    secret: str


class Secrets(StrictModel):
    """What `secrets.json` holds, made once."""

    database_password: str
    admin_password: str
    session_key: str = Field(description="signs MLflow's sessions")
    s3_admin: Key = Field(description="makes the buckets")
    s3_mlflow: Key = Field(description="MLflow's server, in its own bucket only")
    s3_user: Key = Field(description="steps, in the artifacts' bucket only")


def s3_ports(ports: Ports) -> tuple[int, ...]:
    """Port and gRPC port of each part of the object store, in the order of `stack._MASTER_SLOTS`."""
    return (*ports.s3_inner[:6], ports.s3, ports.s3_inner[6])


def new_key() -> Key:
    return Key(id=secrets.token_hex(10).upper(), secret=secrets.token_hex(20))


def s3_identities(secrets_: Secrets) -> dict[str, object]:
    def identity(name: str, key: Key, actions: list[str]) -> dict[str, object]:
        return {"name": name, "credentials": [{"accessKey": key.id, "secretKey": key.secret}], "actions": actions}

    def inside(bucket: str) -> list[str]:
        return [f"{action}:{bucket}" for action in ("Read", "Write", "List", "Tagging")]

    return {
        "identities": [
            identity("admin", secrets_.s3_admin, ["Admin", "Read", "Write", "List", "Tagging"]),
            identity("mlflow", secrets_.s3_mlflow, inside(MLFLOW_BUCKET)),
            identity("steps", secrets_.s3_user, inside(ARTIFACTS_BUCKET)),
        ]
    }


def auth_config(ports: Ports) -> str:
    database = f"postgresql+psycopg2://{DATABASE_USER}@{HOST}:{ports.postgres}/{DATABASES[1]}"
    # A password is hashed at most once a minute, and not for every metric that a step sends.
    return f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nauth_cache_ttl_seconds = 60\n"


def aws(key: Key) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": key.id, "AWS_SECRET_ACCESS_KEY": key.secret, "AWS_DEFAULT_REGION": REGION}


def user_environment(ports: Ports, secrets_: Secrets) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports.mlflow}",
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": secrets_.admin_password,
        "LING_FLOW_ARTIFACTS": f"s3://{ARTIFACTS_BUCKET}/artifacts",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{ports.s3}",
        **aws(secrets_.s3_user),
    }


def env_text(ports: Ports, secrets_: Secrets) -> str:
    lines = (f"export {name}={shlex.quote(value)}" for name, value in user_environment(ports, secrets_).items())
    return "\n".join(lines) + "\n"
