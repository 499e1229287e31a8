"""What running the networks takes beyond their arithmetic: devices, memory, speed, and outputs that are not finite."""
