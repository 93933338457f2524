"""Results of sampling: folders of heads, the page that shows them, and transforms.json."""
