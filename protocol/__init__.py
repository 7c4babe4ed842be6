"""What the services share: messages, codec, links, sessions, times. Read `messages.py` first."""
