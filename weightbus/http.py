"""The weight routes of engines over HTTP, for apps of users: ``pip install weightbus[http]``."""

from weightbus.tools.http.app import Engine as Engine
from weightbus.tools.http.app import create_app as create_app
from weightbus.tools.http.app import router as router
from weightbus.tools.http.command import main as main
