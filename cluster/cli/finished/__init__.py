"""What can be typed about a finished run? What it is used for; training one, and looking at its data, is cli's."""
