"""The agent: starts kernels beside a container engine and relays their channels."""
