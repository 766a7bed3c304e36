"""Start the process that serves a system, after checking what can be checked before it.

Imports no torch: what `patchbay serve` starts imports it, and a process that checks and then waits need not do so, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bentos.hosted import device_of, workers
from bentos.settings import Settings, check, placed
from bentos.tokens import Tokens
from registry.ab.ledger import Ledger
from registry.errors import ConfigError
from registry.home import home

KEEP_ALIVE_S = 75
"""idle connections are closed after this; longer than proxies keep theirs (60 s), or they send into a closed one"""


def serve(
    name: str, host: str = "127.0.0.1", port: int = 3000, background: bool = False,
    given: Mapping[str, str] | None = None, log: int | None = None, watched: bool = False,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Run the service for system `name`: this process becomes it, or, in the background, starts it. One worker
    is a process under uvicorn (`bentos.alone`), several are BentoML's.

    given: variables of the environment as flags set them. log: descriptor of the file it writes on. watched:
    whoever starts it starts it again, too; it then listens only while it is ready. Raises as `check`, before anything
    is started.
    """
    settings = {
        **os.environ, **(given or {}), "PATCHBAY_SYSTEM": name, "PATCHBAY_HOME": str(home()),
        "PATCHBAY_URL": f"http://{f'[{host}]' if ':' in host else host}:{port}", "BENTOML_DO_NOT_TRACK": "true",
    }  # fmt: skip
    settings = placed(settings)
    Tokens.from_environment(settings).check_host(host)
    declared = Settings.from_environment(settings)
    head = None if declared.pinned else Ledger().head(declared.system)
    try:
        several = workers(settings)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    for number in range(1, several + 1):
        check(replace(declared, device=device_of(number, settings)), head)
    command = [sys.executable, "-m", "bentos.alone", *(["--once"] if watched else []), host, str(port)]
    if several > 1:
        command = [
            sys.executable, "-m", "bentoml", "serve", "bentos.service:Patchbay", "--host", host, "--port", str(port),
            "--timeout-keep-alive", str(KEEP_ALIVE_S),
        ]  # fmt: skip
    root = Path(__file__).parent.parent
    if not background:
        # whoever ends this process means the service, and a parent that only waits would hold torch in its memory
        os.chdir(root)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, settings)
    return subprocess.Popen(command, env=settings, cwd=root, stdout=log, stderr=log)
