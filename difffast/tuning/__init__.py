"""What tune is made of: measured runs, the profile of steps, the search in it, results, and what is kept of them."""
