"""What several methods share. Imports core and targets."""
