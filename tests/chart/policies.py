"""Who may connect to whom under a set of NetworkPolicies, as the API defines it. Written for what the chart renders; anything else is an error."""


def matches(selector, labels):
    if selector.keys() - {"matchLabels", "matchExpressions"}:
        raise NotImplementedError(selector)
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise NotImplementedError(expression)
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def peer_matches(peer, policy, pod):
    """`pod` is None for what is no pod: a node, the API server, a machine outside."""
    if peer.keys() - {"podSelector", "namespaceSelector"}:
        raise NotImplementedError(peer)
    if pod is None:
        return False
    if "namespaceSelector" in peer:
        in_namespace = matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod["namespace"]})
    else:
        in_namespace = pod["namespace"] == policy["metadata"]["namespace"]
    return in_namespace and matches(peer.get("podSelector", {}), pod["labels"])


def side_allows(policies, direction, pod, other, port, protocol):
    """Whether `pod`'s own policies let it speak in `direction`: all that select it are added up; none means all is allowed."""
    if pod is None:
        return True
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod["namespace"]
        and direction.capitalize() in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod["labels"])
    ]
    peers = {"ingress": "from", "egress": "to"}[direction]
    for policy in selecting:
        for rule in policy["spec"].get(direction, []):
            port_fits = {"port": port, "protocol": protocol} in rule["ports"]
            peer_fits = peers not in rule or any(peer_matches(peer, policy, other) for peer in rule[peers])
            if port_fits and peer_fits:
                return True
    return not selecting


def allowed(policies, source, target, port, protocol="TCP"):
    return side_allows(policies, "egress", source, target, port, protocol) and side_allows(policies, "ingress", target, source, port, protocol)
