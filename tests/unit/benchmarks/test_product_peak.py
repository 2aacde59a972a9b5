from comparison.product_peak import best_product


def test_the_best_of_the_shapes_is_told() -> None:
    rate, shape = best_product([(3, 1, 2)])
    assert shape == (2048, 2048, 2048)
    assert rate > 0
