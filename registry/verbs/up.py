"""The verb that starts a whole deployment."""

from __future__ import annotations

import argparse
import importlib
import signal
import threading

from registry.verbs.said import Says, free


def up(args: argparse.Namespace) -> Says:
    """MLflow with logins, and services, behind one port: started and watched until Ctrl-C"""
    stack = importlib.import_module("bentos.up")
    free(args.host, args.port)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with stack.Stack(args.systems, args.host, args.port, args.replicas) as running:
        running.start(ended.is_set)
        if not ended.is_set():
            print(running.told(), flush=True)  # noqa: T201  it stays
        running.watch(ended.is_set)
    return Says("stopped", url=running.url)
