"""Device profiles: one TOML file per device, every figure with its source."""
