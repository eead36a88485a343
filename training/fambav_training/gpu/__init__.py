"""What is measured on a GPU, and what is known of GPU kernels without one."""
