"""The command, the supervisor, and the offline API."""
