"""Running the networks: devices, memory, speed, and outputs that are not finite."""
