"""What knows microcontrollers' tools: integer ports, tflite-micro, vela, C sources for firmware."""

__all__: list[str] = []
