"""Engines: workers, the processes and Ray actors they run in, and what they fit."""
