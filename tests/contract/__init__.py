"""Lightning's own tests, run under the strategies of this package."""
