"""What takes too long for every run of the tests? Campaigns, started by hand; tests run slices of them."""
