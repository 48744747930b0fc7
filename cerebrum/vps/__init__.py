"""The rooms of the VPS's daemon. Never imports cerebrum/pi."""
