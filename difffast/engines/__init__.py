"""What executes a part of the UNet: PyTorch as it is, or compiled programs, and what programs take as inputs."""
