"""The control channel's messages between ranks and hub, typed and bounded (docs/protocol.md).

One file for each subject. ``client_messages`` has those of clients, ``wire`` puts both into frames.
"""

from weightbus.control.messages.base import *
from weightbus.control.messages.diagnosis import *
from weightbus.control.messages.joining import *
from weightbus.control.messages.members import *
from weightbus.control.messages.partial import *
from weightbus.control.messages.rounds import *
from weightbus.control.messages.store import *
from weightbus.control.messages.tasks import *
from weightbus.control.messages.waiting import *
