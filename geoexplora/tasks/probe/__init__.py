"""``geoexplora probe``: cached features of a frozen encoder, and classifiers on them."""
