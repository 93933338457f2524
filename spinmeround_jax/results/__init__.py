"""What sampling writes: a folder per head and the page that shows them."""
