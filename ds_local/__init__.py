"""ds_local"""
