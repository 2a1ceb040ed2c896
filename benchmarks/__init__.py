"""What this project costs against what a user would otherwise use: `make bench`."""
