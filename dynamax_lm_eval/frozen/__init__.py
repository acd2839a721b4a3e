"""Text read with a frozen backbone: what training and every measurement on text stand on."""
