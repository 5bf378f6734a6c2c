"""The team's servers on one machine: PostgreSQL, an S3 object store (SeaweedFS), MLflow on both with passwords.

All of it lives in one directory: `stack.json` (ports, and whether it should be up), `secrets.json`, `env` (what a user
of the stack needs, both readable by their owner only), `postgres/`, `s3/`, one log for each server. Nothing listens
anywhere but on 127.0.0.1. PostgreSQL refuses to run as root: root starts it as the user `postgres` (made by Debian's
package), who must be able to reach the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from ling_flow.config import StrictModel, parse
from ling_flow.daemon import Daemon, as_account
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.doctor import install
from ling_flow.flow.stack_settings import (
    ADMIN,
    ARTIFACTS_BUCKET,
    DATABASE_USER,
    DATABASES,
    HOST,
    MLFLOW_BUCKET,
    REGION,
    Ports,
    Record,
    Secrets,
    auth_config,
    aws,
    env_text,
    new_key,
    s3_identities,
    s3_ports,
    user_environment,
)
from ling_flow.ports import claim_port, direct

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

FIRST_PORT = 15400
START_SECONDS = 180.0  # MLflow makes its tables; on a busy machine that takes long
_MASTER_SLOTS = ("master", "volume", "filer", "s3")


class ServerStatus(StrictModel):
    """What is known of one server."""

    name: Literal["postgres", "s3", "mlflow"]
    state: Literal["healthy", "not answering", "crashed", "stopped"]
    url: str
    log: str


def _in_one_line(method: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """What the system says of the stack's files, as an error of a kind."""

    @functools.wraps(method)
    def told(*arguments: Given.args, **named: Given.kwargs) -> Returned:
        try:
            return method(*arguments, **named)
        except PermissionError as error:
            text = "belongs to another user: act as that one, or name another home by LING_FLOW_HOME"
            raise UserError(f"{error.filename or 'the stack'}: {text}") from None
        except OSError as error:
            raise SystemFault(f"{error.filename or 'the stack'}: cannot be used ({error.strerror or error})") from None

    return told


class Stack:
    """The stack whose directory is `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.postgres = Daemon("postgres", self.directory, signal.SIGINT)  # "fast": ends sessions, keeps data
        self.s3 = Daemon("s3", self.directory)
        self.mlflow = Daemon("mlflow", self.directory)
        self.env_file = self.directory / "env"

    @_in_one_line
    def up(self) -> None:
        """Start what does not run, and wait until all answer. What runs is left alone.

        Raises:
            UserError: a program or package is missing, a port is taken, the directory cannot be used.
            SystemFault: a server did not come up.
        """
        pg_bin, weed = _programs()
        account = _account(self.directory)
        with self._alone(), contextlib.ExitStack() as claims:
            secrets_ = self._secrets()
            record = self._record()
            if record is None:
                record = Record(wanted_up=True, ports=_choose_ports(claims))
            else:
                self._claim_ports(record.ports, claims)
            self._write("stack.json", record.model_copy(update={"wanted_up": True}).model_dump_json(indent=1))
            with ThreadPoolExecutor(2) as pool:
                starts = (
                    pool.submit(self._start_postgres, record.ports, secrets_, pg_bin, account),
                    pool.submit(self._start_s3, record.ports, secrets_, weed),
                )
                for start in starts:
                    start.result()
            self._start_mlflow(record.ports, secrets_)
            self._write("env", env_text(record.ports, secrets_))

    @_in_one_line
    def down(self) -> list[str]:
        """Stop the servers, those that need others first; names of those that ran. Data stays."""
        if self._record() is None:
            return []
        with self._alone():
            record = self._record()
            assert record is not None
            self._write("stack.json", record.model_copy(update={"wanted_up": False}).model_dump_json(indent=1))
            first = [self.mlflow.stop()]
            with ThreadPoolExecutor(2) as pool:
                stopped = first + list(pool.map(Daemon.stop, (self.s3, self.postgres)))
            return [name for name, was in zip(("mlflow", "s3", "postgres"), stopped, strict=True) if was]

    @_in_one_line
    def status(self) -> list[ServerStatus]:
        """The servers, as they are now; empty where there never was a stack."""
        record = self._record()
        if record is None:
            return []
        secrets_, ports = self._secrets(), record.ports
        checks = {
            self.postgres: (f"postgresql://{HOST}:{ports.postgres}", partial(_postgres_answers, ports, secrets_)),
            self.s3: (f"http://{HOST}:{ports.s3}", partial(_http_answers, f"http://{HOST}:{ports.s3}/healthz")),
            self.mlflow: (f"http://{HOST}:{ports.mlflow}", partial(_mlflow_answers, ports)),
        }
        found = []
        for daemon, (url, answers) in checks.items():
            if daemon.running():
                state = "healthy" if answers() else "not answering"
            else:
                state = "crashed" if record.wanted_up else "stopped"
            found.append(ServerStatus(name=daemon.name, state=state, url=url, log=str(daemon.log)))
        return found

    @_in_one_line
    def environment(self) -> dict[str, str]:
        """The variables that lead to the stack.

        Raises:
            UserError: it was never started.
        """
        record = self._record()
        if record is None or not self.env_file.exists():
            raise UserError(f"{self.directory}: no stack was started there; run lingflow stack up")
        return user_environment(record.ports, self._secrets())

    def _start_postgres(
        self, ports: Ports, secrets_: Secrets, binaries: Path, account: pwd.struct_passwd | None
    ) -> None:
        if self.postgres.running():
            self.postgres.wait_until(partial(_postgres_answers, ports, secrets_), START_SECONDS)
            return
        data = self.directory / "postgres"
        if not data.exists():
            _init_database(data, binaries, secrets_, account)
        settings = {
            "listen_addresses": HOST,
            "port": str(ports.postgres),
            "unix_socket_directories": "",  # their paths may not be longer than 107 characters
        }
        command = [str(binaries / "postgres"), "-D", str(data)]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"}
        self.postgres.start(command, environment, account, cwd=self.directory)
        self.postgres.wait_until(partial(_postgres_answers, ports, secrets_), START_SECONDS)
        _make_databases(ports, secrets_)

    def _start_s3(self, ports: Ports, secrets_: Secrets, weed: str) -> None:
        answers = partial(_http_answers, f"http://{HOST}:{ports.s3}/healthz")
        if self.s3.running():
            self.s3.wait_until(answers, START_SECONDS)
            return
        data = self.directory / "s3"
        data.mkdir(exist_ok=True)
        self._write("s3.json", json.dumps(s3_identities(secrets_)))
        command = [weed, "server", "-dir", str(data), "-ip", HOST, "-ip.bind", HOST, "-filer", "-s3"]
        command += ["-s3.config", str(self.directory / "s3.json"), "-s3.port.iceberg", "0", "-s3.port.lance", "0"]
        # Volumes of 256 MiB, as many as the disk holds.
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB", "256", "-volume.max", "0"]
        command += ["-volume.preStopSeconds", "0"]  # nobody to take over when it stops
        for slot, port, grpc in zip(_MASTER_SLOTS, s3_ports(ports)[::2], s3_ports(ports)[1::2], strict=True):
            command += [f"-{slot}.port", str(port), f"-{slot}.port.grpc", str(grpc)]
        # SeaweedFS makes an administrator of the key it finds in AWS_ACCESS_KEY_ID: of a user who starts the stack.
        self.s3.start(command, _environment_without("AWS_", "WEED_"), cwd=self.directory)
        self.s3.wait_until(answers, START_SECONDS)
        _make_buckets(ports, secrets_)

    def _start_mlflow(self, ports: Ports, secrets_: Secrets) -> None:
        answers = partial(_mlflow_answers, ports)
        if self.mlflow.running():
            self.mlflow.wait_until(answers, START_SECONDS)
            return
        self._write("auth.ini", auth_config(ports))
        url = f"postgresql+psycopg2://{DATABASE_USER}@{HOST}:{ports.postgres}"
        # What is secret goes through the environment: arguments can be read by everyone on the machine.
        environment = _environment_without("MLFLOW_", "AWS_", "PG") | {
            "PGPASSWORD": secrets_.database_password,
            "MLFLOW_BACKEND_STORE_URI": f"{url}/{DATABASES[0]}",
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{MLFLOW_BUCKET}",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.directory / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
            "MLFLOW_AUTH_ADMIN_PASSWORD": secrets_.admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets_.session_key,
            "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{ports.s3}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs are ours to run
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **aws(secrets_.s3_mlflow),
        }
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
        command += ["--host", HOST, "--port", str(ports.mlflow)]
        self.mlflow.start(command, environment, cwd=self.directory)
        self.mlflow.wait_until(answers, START_SECONDS)

    def _record(self) -> Record | None:
        path = self.directory / "stack.json"
        return parse(Record, path.read_text(), str(path)) if path.exists() else None

    def _secrets(self) -> Secrets:
        path = self.directory / "secrets.json"
        if path.exists():
            return parse(Secrets, path.read_text(), str(path))
        made = Secrets(
            database_password=secrets.token_hex(16),
            admin_password=secrets.token_hex(16),
            session_key=secrets.token_hex(32),
            s3_admin=new_key(),
            s3_mlflow=new_key(),
            s3_user=new_key(),
        )
        self._write("secrets.json", made.model_dump_json(indent=1))
        return made

    def _claim_ports(self, ports: Ports, claims: contextlib.ExitStack) -> None:
        """Those of the servers that do not run.

        Raises:
            UserError: one is taken.
        """
        wanted = {self.postgres: (ports.postgres,), self.s3: s3_ports(ports), self.mlflow: (ports.mlflow,)}
        for daemon, numbers in wanted.items():
            if daemon.running():
                continue
            daemon.kill_stragglers()
            for number in numbers:
                claim = claim_port(number, patience=10)
                if claim is None:
                    raise UserError(
                        f"{self.directory}/stack.json: port {number} of {daemon.name} is taken by another program; "
                        "end that, or write a free one there"
                    )
                claims.enter_context(claim)

    def _write(self, name: str, text: str) -> None:
        """A file of ours, whole or not at all, for its owner only."""
        path = self.directory / name
        temporary = path.with_name(f"{name}.{os.getpid()}.partial")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.directory / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _programs() -> tuple[Path, str]:
    """The directory of PostgreSQL's programs and the path of SeaweedFS.

    Raises:
        UserError: one of them, or a Python package that MLflow's server needs, is missing.
    """
    import importlib.util

    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    postgres = str(versions[-1]) if versions else shutil.which("postgres")
    found = _need_program(postgres, "PostgreSQL", "apt-get install postgresql")
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    weed = _need_program(shutil.which("weed", path=place), "weed (SeaweedFS)", install("stack"))
    for name in ("psycopg2", "boto3", "mlflow", "flask_wtf"):
        _need_program(name if importlib.util.find_spec(name) else None, name, install("stack"))
    return Path(found).resolve().parent, weed


def _need_program(path: str | None, name: str, package: str) -> str:
    """The program's path.

    Raises:
        UserError: it is not there; the message says what brings it.
    """
    if path is None:
        raise UserError(f"{name}: not found on this machine; {package}")
    return path


def _account(directory: Path) -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as: ourselves, or `postgres` where we are root. Makes the directory.

    Raises:
        UserError: there is no such user, or it cannot reach the directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror}); give --home another one") from None
    if os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam("postgres")
    except KeyError:
        raise UserError(
            "root cannot run PostgreSQL and there is no user 'postgres'; apt-get install postgresql"
        ) from None
    reached = subprocess.run(["test", "-x", str(directory)], cwd="/", check=False, **as_account(account))
    if reached.returncode != 0:
        raise UserError(
            f"{directory}: the user 'postgres', whom root runs PostgreSQL as, may not enter it; "
            "chmod o+x it and the directories above it, or give --home another one"
        )
    return account


def _init_database(data: Path, binaries: Path, secrets_: Secrets, account: pwd.struct_passwd | None) -> None:
    """An empty database directory, whole or not at all."""
    partial_, password = data.with_name("postgres.partial"), data.with_name("postgres.password")
    shutil.rmtree(partial_, ignore_errors=True)
    partial_.mkdir(mode=0o700)
    password.unlink(missing_ok=True)
    password.touch(mode=0o600)
    password.write_text(secrets_.database_password)
    if account:
        for path in (partial_, password):
            os.chown(path, account.pw_uid, account.pw_gid)
    command = [str(binaries / "initdb"), "-D", str(partial_), "-U", DATABASE_USER, "-E", "UTF8", "--locale=C.UTF-8"]
    command += ["--auth=scram-sha-256", f"--pwfile={password}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **as_account(account))
    finally:
        password.unlink()
    if done.returncode != 0:
        shutil.rmtree(partial_, ignore_errors=True)
        raise SystemFault(f"initdb failed in {data}: {done.stderr.strip()[-500:]}")
    partial_.rename(data)


def _make_databases(ports: Ports, secrets_: Secrets) -> None:
    import psycopg2

    connection = psycopg2.connect(**_database(ports, secrets_))
    try:
        connection.autocommit = True  # a database is not made inside a transaction
        with connection.cursor() as cursor:
            for name in DATABASES:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE DATABASE {name}")
    finally:
        connection.close()


def _make_buckets(ports: Ports, secrets_: Secrets) -> None:
    import boto3

    key = secrets_.s3_admin
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{HOST}:{ports.s3}",
        aws_access_key_id=key.id,
        aws_secret_access_key=key.secret,
        region_name=REGION,
    )
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in (ARTIFACTS_BUCKET, MLFLOW_BUCKET):
        if name not in there:
            client.create_bucket(Bucket=name)


def _postgres_answers(ports: Ports, secrets_: Secrets) -> bool:
    import psycopg2

    try:
        psycopg2.connect(**_database(ports, secrets_)).close()
    except psycopg2.OperationalError:
        return False
    return True


def _mlflow_answers(ports: Ports) -> bool:
    return _http_answers(f"http://{HOST}:{ports.mlflow}/health")


def _http_answers(url: str) -> bool:
    try:
        with direct.open(url, timeout=5):
            return True
    except OSError:
        return False


def _database(ports: Ports, secrets_: Secrets) -> dict[str, str | int]:
    return {
        "host": HOST,
        "port": ports.postgres,
        "user": DATABASE_USER,
        "password": secrets_.database_password,
        "dbname": "postgres",
        "connect_timeout": 5,
    }


def _choose_ports(claims: contextlib.ExitStack) -> Ports:
    """The first free ones."""
    found: list[int] = []
    for port in range(FIRST_PORT, 65536):
        claim = claim_port(port)
        if claim is not None:
            claims.enter_context(claim)
            found.append(port)
        if len(found) == 10:
            break
    else:
        raise SystemFault(f"there are no ten free ports from {FIRST_PORT} on")
    postgres, mlflow, s3, *inner = found
    return Ports(postgres=postgres, mlflow=mlflow, s3=s3, s3_inner=tuple(inner))


def _environment_without(*prefixes: str) -> dict[str, str]:
    """The environment of whoever starts the stack, without what would steer a server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
