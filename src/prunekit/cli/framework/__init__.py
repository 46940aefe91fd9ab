"""How any command is made: options from dataclasses, settings from files, events of a run."""
