"""What several tests share; nothing here is a test."""

from pathlib import Path

SUPPORT = Path(__file__).parent
"""The folder of the scripts that tests start as processes."""
