"""Both ends of the control channel: messages, keys, and a rank's or client's link to the hub. No torch."""
