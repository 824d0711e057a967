"""What holds strangers' input to bounds, and turns what leaves a public function into an error of ours."""
