"""The bundled pico model: a small Llama that writes Python, its trainer and its yardstick."""
