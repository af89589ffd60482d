"""What goes wrong around training, provoked for real: signals, kills, full disks, damaged files."""
