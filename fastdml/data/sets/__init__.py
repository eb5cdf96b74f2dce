"""Files to checked images and labels: a module a data set."""
