"""What is known of GPU kernels without a GPU."""
