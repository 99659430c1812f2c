"""What the forked processes have imported before they fork: every command."""

import importlib

from hostile import COMMANDS, SCRIPTS

for name in (*COMMANDS, *SCRIPTS.values()):
    importlib.import_module(name)
