"""What is known of each sample: columns of its label files, their index, and subsets that are chosen by them."""
